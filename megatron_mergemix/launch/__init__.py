"""The verbs that start jobs, here or on a cluster, and show them; the plugin's launcher."""

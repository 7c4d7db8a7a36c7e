"""The verbs that start jobs, on this machine or on a cluster."""

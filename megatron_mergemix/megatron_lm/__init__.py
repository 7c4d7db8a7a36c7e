"""The plugin: what ``--mergemix-config`` does to a launch of Megatron-LM's ``pretrain_gpt.py``.

Read ``hooks.py`` first: four functions, called by the launcher or by a patched Megatron-LM.
"""

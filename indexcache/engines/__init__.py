"""Serving engines: what each one reads of a config, and how to run a search inside one."""

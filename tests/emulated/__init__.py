"""A device that is none: what a GPU would refuse or wait for, found without one."""

"""Process group, small collectives and seeds. The one-process path is the same code with a group of one."""

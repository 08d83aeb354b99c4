"""The commands of ``fdconv``, one file each. They import what is heavy when they run."""

"""Starts a recipe where it is to run: on this machine, on a Ray cluster that is there already, or as a Slurm job.

One description of a cluster (``spec``) is rendered (``local``, ``ray_jobs``, ``slurm``) to the exact files and
the exact command (``plan``): a dry run shows them, a real one carries them out.
"""

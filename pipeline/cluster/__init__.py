"""A run on a Slurm cluster: its jobs (`jobs`), Slurm's view of them (`slurm`), and its progress (`status`)."""

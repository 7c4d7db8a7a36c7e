"""What every rank of a job does, once its process group stands."""

"""What happens to a pipeline on laptops and clusters, done to it on purpose; see __main__."""

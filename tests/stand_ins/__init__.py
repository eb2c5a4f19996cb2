"""What stands in, on this machine, for the services that a cluster run talks to."""

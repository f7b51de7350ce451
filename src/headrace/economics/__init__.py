"""What many plans cost: services, fleets, sampling, the installed stock. Pure values."""

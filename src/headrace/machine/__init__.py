"""What it runs on: processors, hosts, disks and links; every constant with its range and source. No torch."""

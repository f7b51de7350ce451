"""Stand-ins for disk and devices, whose order of events a test decides."""

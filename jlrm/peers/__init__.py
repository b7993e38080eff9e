"""How fast are others? One workload for jlrm and other libraries, each in its own Python."""

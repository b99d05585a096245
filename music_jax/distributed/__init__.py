"""Devices and processes: the mesh, joining a cluster, propagation of failures."""

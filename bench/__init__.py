"""Benchmarks of mullama and of its peers. They use the public Python API or HTTP only; README.md says how."""

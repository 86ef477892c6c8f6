"""What a step costs on a machine: measured, fitted, and asked by the simulator."""

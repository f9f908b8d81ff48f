"""Generated from proto/sage_fed/v1 by `make proto`; nothing here is written by hand."""

"""What every command needs while it runs, and that knows no model.

processes     one process or those of torchrun, the device, bfloat16
interruption  signals, asked after each step
progress      a bar or lines, and TensorBoard
run_folder    runs/<name>/ and how files are written there
peak_memory   the highest memory of a stretch of work
timing        fair times of things that compete
"""

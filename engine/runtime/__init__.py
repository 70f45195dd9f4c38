"""What every command needs while it runs, whatever the model.

processes     one process or a torchrun group, the device, bfloat16
interruption  Ctrl-C and SIGTERM, checked after each step
progress      a bar or lines, and TensorBoard
claims        who works on a folder, of all processes and machines
run_folder    runs/<name>/ and how files are written there
peak_memory   peak memory of a piece of work
timing        fair timing of competing functions
"""

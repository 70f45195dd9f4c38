"""What train.py prints before it trains: lists, a first config for a folder of pictures, and other projects' arguments.

keys           every key of a config with type, default and comment: `--keys`, and docs/configs.md
models_list    architectures, teachers and losses, one line each: `--list`
data_folder    what a folder of pictures holds: format, splits, classes
first_config   the annotated config that `--init` writes for it
translation    arguments of other projects -> the key=value or command that does the same here
"""

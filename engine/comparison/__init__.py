"""What compare.py is made of.

study            the rows of a file, each a config trained with several seeds
table            what each row scored, and whether that differs
plot             comparison.png
condensed_table  what condensed sets are worth
"""

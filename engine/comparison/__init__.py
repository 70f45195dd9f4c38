"""The parts of compare.py.

study            the rows of a file, each a config trained with several seeds
rows             one row, whether two train alike, the epochs for as much compute as another
decision         the rule of the verdicts
table            the score of each row, and whether two scores differ
plot             comparison.png
pictures         the test pictures on which the models differ
condensed_table  the value of condensed sets
work             the runs and sets of a study in their order, and which are done, by whatever process
submission       workers on a cluster or on this machine, through submitit
one_row          one row of a study, for train.py
"""

"""The training loop, its state, hooks and evaluation. Nothing here reads a configuration or a file.

state.py         the step and the data cursor, as a checkpoint stores them
intervals.py     at which steps to log, evaluate, save and leave, by GPT-NeoX's rules
hooks.py         the events of a run and the objects that receive them
loop.py          `fit`
evaluate.py      the loss on held-out data
micro_batches.py micro batches on their way into a step: sample ids and waiting time
reporting.py     the hook that turns steps into metrics and log lines
"""

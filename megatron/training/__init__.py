"""The training loop: state, cadence, the loop itself, its hooks, evaluation. No configuration and no files here.

state.py     what a run must remember: the step and the data cursor
intervals.py   at which steps to log, evaluate, save and leave, by GPT-NeoX's rules
hooks.py     the named moments of a run and who hears of them
loop.py      `fit`
evaluate.py  the loss on held-out data
micro_batches.py the batches on their way into a step: sample ids and waiting time
reporting.py the hook that turns steps into metrics and lines
"""

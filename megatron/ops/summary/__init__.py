"""What a shard of a row leaves behind under context parallelism: its state from an empty start, and its total decay.

One module per family of operators. A summary (A, D) obeys `final(S) = D S + A` for the state S before the shard, where `final`
is the operator's last state; document boundaries inside the shard act on A only (`parallel/context.py` drops D for them).
"""

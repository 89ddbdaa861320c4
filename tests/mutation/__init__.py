"""Mutation testing: small mistakes put into a copy of the tree one at a time, and the tests that must notice each of them.

nice -n 10 python -m tests.mutation                       all of `mutations.yml`, results to benchmarks/results/mutation.json
python -m tests.mutation --area checkpoint --again        one area, and what was run before too
"""

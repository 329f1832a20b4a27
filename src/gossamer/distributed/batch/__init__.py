"""``gossamer batch --ray``: a batch over many processes and machines, where nothing that is finished is computed again.

Ray Data decides which actor answers which part; what is finished is kept by us, a line per answer, in a directory that
all of them see. A job from its first file to its last::

    tables, source    the input as requests: JSONL, Parquet, or a directory of either
    grouping          requests in an order in which common prefixes are neighbours, cut into parts
    plan              OUT.parts/plan.json: what was planned of which input with which options
    ownership         who may write a part now; who was taken for dead finds out before the next line
    attempts          rows that were begun, so that one that kills its process is found
    part_runner       an actor: a model that answers part after part
    ray_job           parts over actors, and how far they are
    quiet             Ray's own messages, kept to itself
    nodes, tokens     whether a cluster, and each machine of it, can work on the job
    merge             one file, in the order of the input
    job               all of it, as the command runs it
"""

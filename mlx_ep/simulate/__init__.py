"""A serving cluster in simulated time: no device, no weights, one core.

    cluster, model   what there is            (JSON files)
    traces           what is asked            (JSON lines)
    times/           what a step takes        (a measured bundle, or a hardware profile)
    routing          which experts it uses
    blocks, scheduler   what an instance runs next, as vLLM decides it
    engine           steps in time, many alike at once
    results          CSV, totals, log lines

`run.simulate` puts them together. docs/simulate.md says what is modelled and what not.
"""

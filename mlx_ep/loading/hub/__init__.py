"""From the hub by HTTP byte ranges: a rank fetches what it holds.

    repository   a commit as a model folder whose weight files have holes
    fetch        which bytes a rank needs, and getting them
    remote       one file on the hub, read by ranges; retries: when to ask again
    sparse       one file on disk with holes, and its journal; ranges: sets of bytes

Nothing is imported here: `mlx_ep.loading.checkpoint` needs `sparse`, and `fetch` needs
`mlx_ep.loading.checkpoint`.
"""

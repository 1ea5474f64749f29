"""One file a paper: options, objectives and stages, as ``python -m bertops distill SYSTEM`` runs them.

From Python::

    options = tinybert.Options(layers=3, augment=5)
    with Work("tinybert", "teacher/model", "sst2", "runs/tinybert", options) as work:
        tinybert.distill(work, options)

and, where the paper has it, on plain text before any task::

    options = tinybert.TextOptions(layers=3)
    with TextWork("tinybert", "pretrained/model", "wiki.txt", "runs/general", options) as work:
        tinybert.distill_text(work, options)
"""

"""One file a paper: options, objectives and stages, as ``python -m bertops distill SYSTEM`` runs them."""

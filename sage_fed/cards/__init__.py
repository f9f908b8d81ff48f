"""Rate cards: `rate_card.py` reads, prices and writes them; the bundled ones lie beside it."""

"""Measures what a token costs on this device, and writes it down as a rate card.

`measurement` times steps through the executor and makes prices of the times; `calibrator` runs
that for one caller at a time, and writes the card and its report.
"""

"""Networks as embed, blocks and readout, with exits and uncertainty heads."""

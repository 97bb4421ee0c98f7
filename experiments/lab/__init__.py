"""What the experiments share: presets, models made once, and a table that is filled cell by cell."""

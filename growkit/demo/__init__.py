"""`growkit demo`: `settings` says what is trained, `runs` trains it, `story` has it done, `report` tells of it."""

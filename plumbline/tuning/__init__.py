"""`plumbline tune`: rates found by successive halving. `plumbline.tuning.series` is where to begin reading."""

"""What is measured: each file prints a table, `--json FILE` writes its figures, `--quick` takes less than a minute."""

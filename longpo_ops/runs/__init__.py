"""What every long run and every command stands on: the journal, locks, errors of disks, checked settings, pages,
the terminal."""

"""What every long run and every command stands on: the journal, checked settings, pages for people, the terminal."""

"""What Holdfast writes and says, recorded: see README.md in this folder."""

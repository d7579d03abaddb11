"""What survives a kill: files that are whole, trainings and generations that go on where they stopped."""

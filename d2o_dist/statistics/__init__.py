"""What attention leaves behind while a prompt is read: each statistic observes the chunks, and is closed at the end."""

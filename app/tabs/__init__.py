"""One file for each tab: its controls, and the events that join them to the floors below."""

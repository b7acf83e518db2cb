"""Starting runs under the launcher, and starting them again."""

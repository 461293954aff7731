"""What was done: sites, and graphs before and after, as text, data and pages."""

"""One file a metric: a paired measurement before and after an edit."""

"""What every page shares: safe text and markdown, sign-in by personal link, headers, templates and styles."""

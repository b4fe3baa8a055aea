"""Sugar for engines whose users expect some. Each module needs its engine; nothing here is needed to resume."""

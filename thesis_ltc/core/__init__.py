"Files, random streams, processes: what every wing stands on."

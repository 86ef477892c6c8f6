"""What chats of every API share: functions that an answer may call, and answers as they are read."""

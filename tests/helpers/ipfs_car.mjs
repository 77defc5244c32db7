// CIDs of files and folders as npm's ipfs-car makes them: a path a line in, a CID a line out.
import readline from 'node:readline'
import { createDirectoryEncoderStream, createFileEncoderStream } from 'ipfs-car'
import { filesFromPaths } from 'files-from-path'
import { stat } from 'node:fs/promises'

for await (const path of readline.createInterface({ input: process.stdin })) {
  const files = await filesFromPaths([path], { hidden: true, sort: true })
  const stream = (await stat(path)).isDirectory() ? createDirectoryEncoderStream(files) : createFileEncoderStream(files[0])
  let root
  await stream.pipeTo(new WritableStream({ write (block) { root = block.cid } }))
  console.log(String(root))
}

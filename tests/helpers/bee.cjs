// Swarm by its own packages, found in the folder of the first argument (node_modules): @ethersphere/bee-js, @fairdatasociety/bmt-js.
//   bee.cjs MODULES hash FILE...              a line for each: its reference by bee-js, and by bmt-js
//   bee.cjs MODULES zeros COUNT...            of so many chunks of zeros and a byte, by bee-js; chunks it has hashed it does not hash again
//   bee.cjs MODULES serve                     what a Bee node answers on /bytes and /chunks; prints its port
//   bee.cjs MODULES upload URL STAMP FILE...  by bee-js; prints references
//   bee.cjs MODULES download URL [REFERENCE FILE]...
const fs = require('fs')
const http = require('http')
const { createRequire } = require('module')
const load = createRequire(`${process.argv[2]}/`)
const { Bee, MerkleTree } = load('@ethersphere/bee-js')
const { Chunk } = createRequire(load.resolve('@ethersphere/bee-js'))('cafe-utility')
const { makeChunkedFile } = load('@fairdatasociety/bmt-js')
const hex = bytes => Buffer.from(bytes).toString('hex')
const STAMP = 'ab'.repeat(32)

async function split(data, keep = async () => {}) {
  const tree = new MerkleTree(keep)
  await tree.append(new Uint8Array(data))
  return hex((await tree.finalize()).hash())
}

async function zeros(counts) {
  const known = new Map()
  const hash = Chunk.prototype.hash
  Chunk.prototype.hash = function () {
    const key = `${this.span} ${Buffer.from(this.writer.buffer).toString('latin1')}`
    if (!known.has(key)) known.set(key, hash.call(this))
    return known.get(key)
  }
  for (const count of counts) console.log(await split(Buffer.alloc(4096 * count + 1)))
}

function serve() {
  const store = new Map() // address -> span (8 bytes) and payload
  const keep = async chunk => {
    const length = chunk.span <= 4096n ? Number(chunk.span) : chunk.writer.cursor
    store.set(hex(chunk.hash()), chunk.build().slice(0, 8 + length))
  }
  const join = address => {
    const chunk = Buffer.from(store.get(address))
    if (chunk.readBigUInt64LE() <= 4096n) return chunk.subarray(8)
    const parts = []
    for (let i = 8; i < chunk.length; i += 32) parts.push(join(hex(chunk.subarray(i, i + 32))))
    return Buffer.concat(parts)
  }
  const answer = async (request, body) => {
    const [, kind, address] = request.url.split('?')[0].split('/')
    if (request.method === 'GET') return store.has(address) ? [200, kind === 'bytes' ? join(address) : store.get(address)] : [404, 'Not Found']
    if (request.headers['swarm-postage-batch-id'] !== STAMP) return [404, 'batch with id not found']
    if (kind === 'bytes') return [201, { reference: await split(body, keep) }]
    const chunk = new Chunk(4096, body.readBigUInt64LE())
    chunk.writer.buffer.set(body.subarray(8))
    store.set(hex(chunk.hash()), body)
    return [201, { reference: hex(chunk.hash()) }]
  }
  const server = http.createServer((request, response) => {
    const parts = []
    request.on('data', part => parts.push(part))
    request.on('end', async () => {
      const [status, said] = await answer(request, Buffer.concat(parts)).catch(error => [500, String(error)])
      const data = said instanceof Uint8Array ? said : JSON.stringify(typeof said === 'string' ? { code: status, message: said } : said)
      response.writeHead(status, { 'content-type': said instanceof Uint8Array ? 'application/octet-stream' : 'application/json' })
      response.end(data)
    })
  })
  server.listen(0, '127.0.0.1', () => console.log(server.address().port))
}

async function main([what, ...words]) {
  if (what === 'hash') {
    for (const file of words) {
      const data = new Uint8Array(fs.readFileSync(file))
      console.log(await split(data), hex(makeChunkedFile(data).address()))
    }
  } else if (what === 'zeros') await zeros(words.map(Number))
  else if (what === 'serve') serve()
  else if (what === 'upload') {
    const [url, stamp, ...files] = words
    for (const file of files) console.log((await new Bee(url).uploadData(stamp, fs.readFileSync(file))).reference.toHex())
  } else {
    const [url, ...pairs] = words
    for (let i = 0; i < pairs.length; i += 2) {
      fs.writeFileSync(pairs[i + 1], (await new Bee(url).downloadData(pairs[i])).toUint8Array())
    }
  }
}

main(process.argv.slice(3)).catch(error => {
  console.error(error)
  process.exit(1)
})
